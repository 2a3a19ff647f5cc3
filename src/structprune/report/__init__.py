"""Pages, charts and model cards, drawn from the values in `results/`.

Read first: `page.py`, the HTML page of a run; then `svg.py`, its charts.
"""
