"""How a run is shown: plain records for JSON, tables for the terminal."""
