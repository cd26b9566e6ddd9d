"""HTML pages that carry their style and figures and open offline.

    charts      heat maps, curves, dots, bars and stacked bars as inline SVG, built on grid, plane and svg
    formats     numbers as text, for every page
    render      Jinja2 with autoescape; templates/ holds the style, tables and figures
    run_page    the page of a training run

nmoe_export and examples/demo render pages of their own with the same parts.
"""
