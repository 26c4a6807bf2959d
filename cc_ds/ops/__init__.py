"""The custom operation of the connection, and its reference."""

from cc_ds.ops.gated_fuse import gated_fuse, gated_fuse_ref

__all__ = ["gated_fuse", "gated_fuse_ref"]
