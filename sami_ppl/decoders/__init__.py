"""Decoders: denoisers guided by the encoder, the bound on −log p(x | z), and exact ones."""
