"""Where convplan meets torch: `adapter` (tensors to problems), `override` (`enable()`), `functional` (`conv1d` …)."""
