# SPDX-License-Identifier: MIT
"""`python -m training.benchmark`: this code beside a naive form of the official one, on the machine it runs on."""
