"""What teaches: ipywidgets and matplotlib, imported by notebooks only."""
