"""What all tests share."""

import hypothesis

# The same examples in every run, and no deadline: the first call of a compiled function compiles it.
_common = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", derandomize=True, **_common)
# For a search of new failures: pytest --hypothesis-profile thorough
hypothesis.settings.register_profile("thorough", max_examples=1000, **_common)
hypothesis.settings.load_profile("default")
