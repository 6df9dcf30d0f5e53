"""The fakes that ship: implementations of the seams that a test drives. Each keeps the contract of its seam."""
