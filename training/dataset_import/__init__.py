# SPDX-License-Identifier: MIT
"""From images as people have them to data sets as training reads them: what dataset_tool.py does."""
