"""Laws of the teacher's eigenvalues, and of S* + delta Z made of them (free additive convolution)."""
