"""What people see of the results: figures, and the atlas, a static site of claims and subjects."""
