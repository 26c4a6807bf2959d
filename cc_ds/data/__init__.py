"""Users' files in, batches for two-pass training out.

sources (open, walk) -> columns (which is which) -> pairs (check, one form) -> templates (render, anchor)
  -> tokenise (ids, labels, truncate) -> cache (once, on disk) -> batches (order, pad)
"""

from cc_ds.data.batches import BatchStream, CCCollator
from cc_ds.data.encode import tokenise_row
from cc_ds.data.pairs import BadRow, Row, Summary, read_rows
from cc_ds.data.templates import RenderedPrompt, Template, TemplateRejects, load_template
from cc_ds.data.tokenise import load_tokenised

__all__ = [
    "BadRow",
    "BatchStream",
    "CCCollator",
    "RenderedPrompt",
    "Row",
    "Summary",
    "Template",
    "TemplateRejects",
    "load_template",
    "load_tokenised",
    "read_rows",
    "tokenise_row",
]
