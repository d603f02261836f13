"""The conformance kit: what a new operator must do, as one function to call in its tests."""

from curvlinops.testing.operators import check_operator

__all__ = ["check_operator"]
