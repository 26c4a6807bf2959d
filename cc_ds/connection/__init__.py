"""The connection between the English and the target pass: capture, decide, fuse."""
