"""What `fxrpg demo` runs: ring models on handwritten digits, or any method and model on the user's own pictures."""
