# SPDX-License-Identifier: MIT
"""The generator of StyleGAN-XL: mapping network with class embeddings, alias-free synthesis network."""
