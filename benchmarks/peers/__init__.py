"""The chain beside its peers, official modules in PyTorch and transformers' classes, with the same weights and photographs."""
