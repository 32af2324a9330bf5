"""Hypothesis runs the laws on the same examples every time: a red test is red for everybody.

`pytest --hypothesis-profile=quick` runs a fifth of them."""
from hypothesis import HealthCheck, settings

for profile, examples in (("laws", 100), ("quick", 20)):
    settings.register_profile(profile, max_examples=examples, deadline=None, derandomize=True,
                              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("laws")
