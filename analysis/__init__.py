"""What the rows say: tables, figures, the report page, Weights & Biases."""
