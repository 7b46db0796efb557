"""The figures that the README states, reproduced on the machine at hand."""
