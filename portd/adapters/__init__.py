"""The adapters to the world, one package a technology. An adapter imports `core` and `leasing.seams`, no other."""
