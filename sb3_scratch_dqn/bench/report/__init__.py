"""Compare the results of finished runs.

- ``report``: the report (``write_report``)
- ``costs``, ``provenance``: its sections on throughput, memory and speed, and on how the runs were made
- ``comparison``: group results by environment and algorithm, and describe each comparison in a sentence
- ``stats``: interquartile means, bootstrap intervals, permutation test
- ``figures``: the figures
- ``document``: a document as Markdown and as HTML
"""
