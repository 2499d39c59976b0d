"""The numerics: pure functions on tensors, from an adapter's factors to shared bases and cores."""
