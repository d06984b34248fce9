"""Optimizers pickled by version 0.1, when modules lay elsewhere, still unpickle."""

from __future__ import annotations

import base64
import pickle
import zlib

import pytest
import torch

from lightning_sketch import BFloat16, RowWise
from lightning_sketch.optimizer.base import CompressedOptimizer

#: After one step with gradients of one at a learning rate of 0.1, over an embedding of 8 x 4.
PICKLED = {
    "AdamW": (
        "eNrtVl1oHEUcv8vd5S6fjaW0Vn0IJ9rESrwkl+Ra2iw1tUEPY43VHtR0nbudu1nd75lNmoajqTVtTgeDdBWUgp9Q9aEgPvUlJ+qL"
        "0BZBESp9sIoPgljfilCs/9m9Xq9tKn2TgAt7N/+PnZ3/7/ffmd989M1NHSH/4ndraokwQzVKMn0JswLpK2iIUkw9vmbM1C0Hg6Hs"
        "UJC+1zvu9R72yl4PTyi4iFyNUd9q0hxvXDr9trje4bE8ZoiC4/cz4jo7Ll26fO78+mObj3o8gi2IjD42+/rPKb6Vt89g8XJZwQU0"
        "C0+8cvDi+Kl1czyOdFpykOJVeEJHB1RdPYhhHC+aDkYF4k3w1gKymOugvCYCnYpaLGIHG0yteWJFF1YNiethbtO1NKzIN7xs0eUx"
        "yhDDHm8rmJqGC0w1DSi6rVaaohYYFMwTeVfVmCpC0ZpvwZv0eDszHQBLdpmqQWyt7GCRqcgWcpCOGXYgk9zXEGDYoKYjTw9AoId3"
        "BM9T+EMlWEWXrJlIkYuOqcv5WQb4H/cenQuHQvNNr7ZqV07s+qv7xY93b+ybb3rytwj8lu1QT64LGLQck5lQgjyNHQo12GFIyAl6"
        "NZUxDcvYUFRk2E2LuVZwslkLyxQApXakbEd7cjFwUmI6zI5lm3IRsFSD2c3ZaC4q5jCNkh3PRl0X3tmTi4vkYMl2qOCX0LoLFs6e"
        "CZytdjjXCTlb0qnB1PBQaiA9vKV/wA7mLViuHcl2TzA7+jTMNmWHVsoNo77uoDdDxlcnqt6m96r9+z9fPr+UqF6gkrT0wgZp6Ifv"
        "lw992PHF6+OF0edzp6o/vnto9Ilv94zuWXp/W2b6Dak3/LKUOPXZ8ravT1cPf/JrdemDP0a/fLZfwhuvjg6e/K4qnb24/M0DP0kn"
        "dzwoFZ97pHrpl9eWH3/r0+3ahY+kTPuy9DfJSUem7KrPdDaUTWSjR71sNBs+6lXIOt72lKNAtyk7g3bonfQY5C2Sh2B0DEbim4hS"
        "hi2PdPeQ+8eurmIKR9IDqfRIJn0DheGVKaznAoXh0LVrXqrB2Ntb8SESYPE4PmDJaLoUQLTaG31kCFq3fzhzJ41ez21o9LNnzmz/"
        "L+8VG73OVWeNK5nasmPO1Ci7d5VTBr+DI8OpGyhL3K6xa7lAWaJGWSx9ZOu/3XVIF7xseKERzq4GOGkBwXkVABpdDYDuNF04YW/z"
        "EWwZGk4P39lWcS23YavYfGz9+XOXL620XbiUt/vnqlxy4DSn3pS/yTb7PmGRFCLxugYhCdJCWus6g7TVpQVpr5COCumcIGsqpKtC"
        "7pogaxeFAgiEDiAKk/Erc8kavsmt3f0PdyeLthglAwWRBAfFWAFPun8gM5jKDGWGBzMjQyOD6UxGBAmyMET3gZGeEg61ZPj5c8ka"
        "9zBmjoshdr0ZwFdEGsVl8BZMkCn0pifmArdYSRZjK1m++fGGhElzZq9KcdKfq16cKKcvBT4FW4yANQhjDR2crb+7XPaQi3i73AgJ"
        "v+cWkWhazJdlDiimsYZUIW023JJtmZpamPV48+5gUBeSMcfVQOqQ/Tw6CaPrgahjgslbsJ7HigJTgfwyQFeBpGvWTUXkToA4VA2x"
        "I1FoF94iDMPVsSasZgq9QUVSTEfM14z1Iwfk43XYwIpQVxdOarvIwbWUhBCgtfEa3dRBXLqgzFwhNMHVXlQdyuQgAHYHBZ1pKNcc"
        "vPtWWe1T2gfLlWeAGTgCaxzViyZ7x6U/a7I85jPkZSM8KvjxKm4eahKCVWhunhD4mwbSQMjmFwAb0ZCi7laBm0zgq6behJsn+3iL"
        "bJiwLAVwATkbc5B45f9NPiUwaA6K9RAqeyDs4mOmawTKvezvQlPB7pPv+wdiQpeD"
    ),
    "Adagrad": (
        "eNrdVk1sG0UUtuN17DhOf7iUUCGMhSDhJ3Li/NhA49KkDWJFUtIDllBYjXfH3qX7492ZbZoGSymQpqnmRAckUBE3VBDtjUNVNb4g"
        "FfUEElKLQFSq4FAJiVwQ4k/wZtdxE9pyLyvZ+/525r3vvZn3lqR31lKR4GH3m0ZNp7Zh1xRyGFNVH1BNRAgmnO2ccKy6h4HRntNQ"
        "zUMaP837j/MG72NJDVeRb1IScB2mx6dKF94Tz/ssaXqKhlW0wOUIi+E64VN7vn39+jdXL11k6Xks9rul7zVsgxrIVJCq+pZvIup4"
        "yhFk+lhoE1XHw0jV+TRLWuioYRnHMF9l2zSjWsUetuHLiikk8aoPbvJpn8UJRRRz1q06polVajg2xNLd8lczVApRsGTFN0xqCJXU"
        "ki3zWc7SsD1goPjUMEF3n+JhYakpdeQhC1PsgaXeu0lBsU2Ey0Og6GM94fcEXqgGXuxQTAdpStVzLKWyQAHW03zfYjQSWeo4lTL/"
        "PHPgt8xrZw/2Dix1vHgzBv8NN9JX3gGJqXsOdSAE5Qj2CMTgRsGg3AMa06DUxAq2NQPZbsfJskglXahjhQA6xI01XKmvHAch0R2P"
        "unG5oxwDzrCp2ylLZUms4dg1NyFLvg979pUTwjh02Y2oQQipA+A4PRQKU260vA1sisO5fG50bDSfL+ZyBTdcV637bkzOTFNXeglW"
        "m3Mjd7KNooFMWHKRyrnR5u5edun8hV3N1O+7xj/46dz482X52VfdVKnr0/PjE4/PrHVMDpZOvHF57c2VfZeeOH5t/Of19N63vvqi"
        "efjHq83izf3NyWv7S9Nv09KK+eGeiw9/vPbM5T/WVn69Mf7C8l9rP3zd3Tz1/SOlszc+K01dP7T3oytfNtc//6T5y0Pfld698mgz"
        "yLQckZOydILLkhw9wVf1nax7xtOgprTJsBz6ZzkFu5P6Y0CtACUKXSIU17n+YJ+emfj7Xk5hvlgcGsuPbklh9C4p3LCFFEYjG89S"
        "qQVjf/9qAJEAiyWIbymeMx9CtG/3vV7ow4PF/GhuC0rJuxV6yxZQSm5C6b9+7UJc5nJ0mW/CsUvgSFQEd1uIpHQvIDnp+HAb3xnK"
        "keJQbvBfUN6t4DZstxSceNbvVHQ+YengdlZqnuNDt5kLjmpnIBOc/hTSE+32pCfliN7V7kh6Cthu+KWn9Z5Vfduqvn1a9I6w8wGK"
        "sABrLmZbmGafzgw+mclWXUFlw2aWBQHBWAPJ8OBQIZ8rjBRG84WxkbH8cKEglDqqY9C+AszwnBAYNTuwX8xCouFdRSbBDdCoDnRG"
        "skmzGIrEbrPO/MsGwdnArO2f8GggBzIN16kOXB5oEx1baC/baHDkI5ZWNkfFHrit8Tt1GjRYD9rlxCZT0dd23WZdd0xDXeCs82BI"
        "tEeDuOeb0Of0WSbNAnVLIXkOsKwLWxWsabAU9F4bmio0907L0YStaPOGLW4QItp/l2Bs38Km4DoJpJQIo7iFaDAUJPDRuoKO1IBM"
        "tUiFuMDFAD0hJK6PPNwySYoZpkVvtxwL5gc4ZhVfzBIgSlcNj1AlVADfQ7Dq2NqGgGVuH5WCbA2Au8o8ZAbuv1aO2kHr8lRpvTVq"
        "xYMMcTnGJJEfvupXICYxrYgpiiUF/o6NTH7SrywDNqKmRNwpgZuiw2EkMOBU9BnWpdgOuKUBLjDLxD0ktvxf1OmcCKMz9Jcj1ODQ"
        "mBMTjm+Hk1cjOP9z4bmvDPwDDlCmJA=="
    ),
    "NAdam": (
        "eNrtVl9oW1UYT9qkzdK0+7+5gaxEmC3O0DRZ1xXXzE3XQVic8yUg9XqSe5Jz7f1/zl3XdcEO3daMgwq9TifikzAHggo+qLjmRRGk"
        "m+LDwBdBBUHwDwOpDIf6nXuTNu066euG94Z7z/l93/lyzu/77jm/qdCrhzsD3sW7VaVMmK7oZYmOYVYkCcqM4ljCMJmiKSex7fKQ"
        "pONxd8bl65lhg4NnSuhIRprLw7lHxXvGPeMecytuD4/IuIQclVGv16La7kjm44vieoOHC5ghCsAvc+K6OpL5/c9r324599BZl7di"
        "EyzDj0+89EMfH+KxcSwmJsm4iCbcbIB3aYaGdeZodWgkYxaOfHPj8i2+BQDDMVUsS0sGVXlEQye8VUC7vWTYGBWJm+PRIjKZY6OC"
        "KgxdslIqYRtiKz7i8DBliGGXdxQNVcVFphg6hV59ZbJSZIKOSMFRVKYIU6iOCRJ4zKdJcpiigm2DZGPhKUsmspGGGXA645IdTQaG"
        "dWrY0vF+MPTwTn885MFGZZjFOkk1kCyVbEOTChMMU/A6MBkMBKZazkfVW28eutn93DtHtyWmWo783ArPihXoya+D5Jq2Abk0VOk4"
        "timswQqCQ15kXlUYU7GEdVlButUynY8CyCZMLFFgi1qtFSvUkw8DSIlhMyucbcm3Qk/RmdWWDeVDIoahl632bMhx4D978u3C2Z+y"
        "FSh6S4gegomzp3wwagXzXeCzN92X6hvYM5AaTCX7+yw/btF0rNZsd45ZoSch2qgVWMk3iBLdftkGrn2+q/be+NGMdXkq87X7WubC"
        "J1/WLp2/f/+N3k01SR0brm78rvbKFw/W/vp+c+2D+e211++7UHu573RmbOjUbG4olfn1s+zs/PVNmdIlq/bb9PUrX518JJNiwdpb"
        "XUbmo8Onh+ejH86evxjbf/PZv2s/btsx+/bITK30x7nazvdnrrz76faMl+lsIBvJhs662VA2eNatkq284wlbhlKSH/PLofeYy8Bv"
        "mjwMrXP1DyREGTZd8kAP2Xnwn7s6hUn4pdNLUhi8UwrrvpDCYKBxTTVo7O2tehQJsnhUcyRYtuwAhfcGS6lkamC1LHm+TSxFzJ+G"
        "V2KpHZ8wJXS87FN0YPhu2A4OeDQlB1YmKjWwd29qYHU7QsO3aUe4uu/qvrl9i8/Fe24JMrfs3bhX/KIXi7JOt0Ste4fxdH9qMJns"
        "XxXjDd8mxl8YWn6/uApk8f5Pxh3KY955KZVtONypO+ptnm0eJnokhUjHgrQgMdJJuhbkA1mbDZB1CxKBrK+SDVWyMUc2VcnmqjjX"
        "NdPGVOQEQuU3Qi4n4/UkxYe6k7u64yVLtOK+oogDQDGWAUkn+wdTfYO7B+FU2rN7Tyo9OCiMBJkYrE9DJz0qAKWse/6T8XrpQJvZ"
        "DgbbYi0BVkIqxRVAiwbIFrpsxKQPi5k0cunNBcqKIMqUYj1qZXnYVQ+s1NExCUSUzsQAX47EKy5yEI9JzWTx7bfpxSal2HGwyVVI"
        "ma23eZuGqhQnXN521G/AIXnay2zYdlSQNgTx0DFoLRpCtgFdvgZrBSzLEArklg46CoRcmwbHhCpaEU3RJdsYp0IqrhEd3dGwKnpt"
        "FGqGCqewhpgnABc2z9ySDzvHW6mjCZBaDrJx3SVStkF++e21Cyq04AjVCFCspNiUSb7BXUFQ+4lNFEp+GkA4NjLSWCT84UJe3Gla"
        "4J0UJK0uN4KSU54beV7Y2jxxKuQ1jwjuDR2pIFoLZ4AXUaNizVHBmURgt6BuzimQZ/gaSTcgnAycgHQN20gBSv4v/TuX/iiww9t8"
        "DlyEgP2tvP2g8PP0e8XbvUb9vaqQ+Benvo/p"
    ),
}


@pytest.mark.parametrize("name", PICKLED)
def test_old_pickles_are_read_and_step(name: str) -> None:
    optimizer = pickle.loads(zlib.decompress(base64.b64decode(PICKLED[name])))
    assert isinstance(optimizer, CompressedOptimizer)
    assert type(optimizer).__name__ == name
    (param,) = optimizer.param_groups[0]["params"]
    assert float(optimizer.state[param]["step"]) == 1
    ((_, layer, _),) = optimizer.compressed_layers()
    assert (BFloat16() if name == "NAdam" else RowWise()) in layer.codecs.values()
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 2
    assert (param < before).all()
