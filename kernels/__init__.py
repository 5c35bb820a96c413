"""The two operations WADS exists for, each with the PyTorch reference that defines its meaning.

``synthesis``  resident uint8 images + global sample ids -> clean image, anomalous image, mask (Eq 3.1)
``objective``  (X, X̂, logits, mask) -> SSIM + L2 + focal + sparsity KL (Eqs 3.3, 3.6, 3.7)
``philox``     the counter-based generator behind every random draw

Imports torch (and triton) alone, so that the folder can be lifted out and used elsewhere.
"""
