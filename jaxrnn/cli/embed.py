"""Gives the vectors of words, known or unknown, and their nearest neighbours.

    jaxrnn embed --run_dir=runs/first river rivers riverlike
    jaxrnn embed --run_dir=runs/first --export=vectors.txt river rivers

A word is known if it was learnt; of any other the network reads the letters.
"""

from absl import flags

from jaxrnn.cli import common


def define_flags() -> None:
    common.define_run('The directory of the run.')
    common.define_source()
    common.define(
        'embed', 'neighbours', 5, 'How many nearest neighbours to show.', at_least=1, at_most=common.MOST
    )
    common.define(
        'embed',
        'export',
        '',
        'Write the vectors to this file in word2vec text format; of all words if none is named.',
    )


def main(arguments: list[str]) -> int:
    from jaxrnn.report import render_neighbours
    from jaxrnn.types import UserError
    from jaxrnn.words import data, run, train

    opened = run.open_run(common.run_dir(), source=common.source())
    dataset = opened.dataset
    words = arguments or (list(dataset.words) if flags.FLAGS.export else [])
    if not words:
        raise UserError(
            'no words found; name some after the flags, or --export a file of all that were learnt'
        )
    letters = data.encode(words, dataset.alphabet, dataset.letters.shape[0])
    vectors = train.predict_words(opened.program.predict, run.newest_params(opened), letters)
    if flags.FLAGS.export:
        data.write_vectors(flags.FLAGS.export, words, vectors)
        common.say(f'{len(words):,} vectors written to {flags.FLAGS.export} (word2vec text)')
    index, cosines = data.nearest(dataset.vectors, vectors, min(flags.FLAGS.neighbours, len(dataset.words)))
    known = set(dataset.words)
    found = [
        {
            'word': word,
            'known': word in known,
            'nearest': [
                {'word': dataset.words[i], 'cosine': float(c)} for i, c in zip(places, near, strict=True)
            ],
            'vector': [float(x) for x in vector],
        }
        for word, places, near, vector in zip(words, index, cosines, vectors, strict=True)
    ]
    if flags.FLAGS.json:
        common.print_json(found)
    elif arguments:
        common.console().print(render_neighbours(found))
    return common.HEALTHY
