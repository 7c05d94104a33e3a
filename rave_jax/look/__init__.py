"""Where the model looks: rows of the attention map as numbers and as pictures, and the report page."""
