"""EleutherAI's lm-evaluation-harness on a model with its connection (pip install lm-eval, or cc_ds[eval]).

    python tools/run_harness.py run --model cc_ds --model_args pretrained=outputs/8b-with-transform --tasks xnli_sw

Everything after the script's name is the harness's own command line; connect=False among --model_args leaves the
connection out, lang=sw names the language of all requests (a transform with a matrix per language needs it). A
task of your own: --include_path FOLDER --tasks NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli


def main() -> None:
    """Register the model and hand over to the harness.

    Raises:
        ValueError: the harness is not installed.
    """
    from cc_ds.dist.group import choose_accelerator

    choose_accelerator()
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"the harness is not installed ({error}): pip install lm-eval") from error
    import cc_ds.eval.harness  # noqa: F401  registers the model

    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
