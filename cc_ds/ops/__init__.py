"""The custom operations of the connection, and their references."""

from cc_ds.ops.capture import capture_row, capture_rows_ref, collect_rows
from cc_ds.ops.extension import status
from cc_ds.ops.gated_fuse import gated_fuse, gated_fuse_, gated_fuse_ref

__all__ = [
    "capture_row",
    "capture_rows_ref",
    "collect_rows",
    "gated_fuse",
    "gated_fuse_",
    "gated_fuse_ref",
    "status",
]
