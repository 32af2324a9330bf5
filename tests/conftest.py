"""Hypothesis runs the laws on the same examples every time: a red test is red for everybody."""
from hypothesis import HealthCheck, settings

settings.register_profile("laws", max_examples=100, deadline=None, derandomize=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("laws")
