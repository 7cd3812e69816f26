"""A published file on the web server of these tests."""

import pytest

from mila_mm.weights.source.published import PublishedFile


@pytest.fixture(scope='session')
def entry():
    """Make the entry of a published file that the server has."""

    def make(server, path='/weights.pth', **known):
        return PublishedFile(
            name='micro',
            task='classification',
            arch='micro',
            url=server.base + path,
            layout='model',
            prefix='',
            result='',
            **known,
        )

    return make
