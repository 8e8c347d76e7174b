# SPDX-License-Identifier: MIT
"""Feature extractors and distances between sets of images; knows images, never a network class."""
