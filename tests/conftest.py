"""What all tests share."""

import hypothesis

# No deadline: the first call of a compiled function compiles it.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")
