"""Export to GGUF, the file format of llama.cpp: architectures, tokenizers, and the file."""
