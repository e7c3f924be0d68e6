# SPDX-License-Identifier: Apache-2.0
"""Pages for people: templates, pictures and text made readable. What is shown comes from `catalog` and `builds`."""
