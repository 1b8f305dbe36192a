"""The charts of the pages, drawn by matplotlib, as SVG that goes into the page and follows its colours."""
