"""What the folders of finished and active runs tell: lists, differences, and steps that are made again."""
