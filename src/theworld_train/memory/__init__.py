"""Memory of training steps, planned or measured: every live storage, what it holds over time, and its picture."""
