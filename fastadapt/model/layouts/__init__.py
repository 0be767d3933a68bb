"""Adapter files of other libraries: diffusers', kohya's and MLX's, read into PEFT's names and fields, and written."""
