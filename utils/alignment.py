"""Alignment of networks: orthogonal Procrustes, mean networks, alignment errors (paper, section 2).

With K = E[φ_a φ_b^H] (D_a, D_b) at a layer and K = U S V^H, A = U V^H is the (partial) isometry that brings a's
activations nearest to b's. Weights W_a (N, D_a·k²) go into b's space as W_a A, on the channel axis; activations with
rows as samples as φ_a Ā, which is φ_a A for real ones. Layers with real weights have real A, from the real part of K.
"""
