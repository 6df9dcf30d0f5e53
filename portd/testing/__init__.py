"""The fakes that ship: what stands in for the world where a test drives the clock. Each keeps its seam's promises."""
