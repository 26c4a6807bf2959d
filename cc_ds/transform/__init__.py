"""The Transform Matrix: collect activations of parallel prompts, fit W, report the fit on held-out pairs."""

from cc_ds.transform.fit import FitResult, fit_transform, fit_transform_result

__all__ = ["FitResult", "fit_transform", "fit_transform_result"]
