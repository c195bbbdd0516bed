"""The cross-domain generator: AugPro operators and the chain that samples them near the target."""
