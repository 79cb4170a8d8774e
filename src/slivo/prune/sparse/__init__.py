"""Sparsity: which weights go to zero (`choice`), set at once (`masks`) or in training (`hooks`), and held (`hold`)."""
