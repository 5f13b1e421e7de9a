"""The algebra of adapters: methods, trees of adapters, rules over paths."""
