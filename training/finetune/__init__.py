# SPDX-License-Identifier: MIT
"""Starting a run from the networks of another one, whatever its classes, its heads and its backbones."""
