"""Triton kernels, one concept a file. Nothing is imported from the layers above.

    EFA       alignment.py puts together: aggregation.py (aggregation_rows.py, aggregation_tiles.py, _scores.py),
              unit_rows.py, hard_similarity.py; ranking.py
    matches   hard_similarity.py puts together: match.py (packed_match.py, persistent_match.py, token_lists.py),
              pool.py, gather_gradient.py, winner_gradient.py (winner_products.py, winner_lists.py); _matches.py is
              their format
    A-SDM     asdm_tiles.py (asdm_prepare.py, asdm_gradient.py, asdm_kept.py), asdm_blocks.py; _asdm.py,
              _row_statistics.py
    all       _launch.py starts kernels and knows chips; _tile.py has what tiles share

The folder is at the top of the repository and installs as `fmfa_losses.kernels`.
Nothing here is imported before a Triton path is chosen, so that `import fmfa_losses` never imports triton.
"""
