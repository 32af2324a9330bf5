"""What the example programs share: training and measuring, scores, tables, pictures and closing checks."""
