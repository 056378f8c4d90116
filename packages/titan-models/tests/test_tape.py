from titan_models.tape import play


def peak(script):
    alive = most = 0
    for kind, amount in script:
        alive += amount if kind == "bytes" else 0
        most = max(most, alive)
    return most, alive


def double(tape, x):
    return tape.op(x.size, (x,), lambda gradient: (tape.new(x.size),), saves=(x,))


def twice(tape, x):
    with tape.scope() as kept:
        middle = double(tape, x)
        kept.append(result := double(tape, middle))
    return result


def test_what_is_saved_lives_until_its_backward():
    played = play(twice, 8)
    assert peak(played.forward) == (16, 16)  # the input and the result of the first, which are saved, and the last
    assert played.result == 8
    assert peak(played.backward) == (8, -16)  # what the forward kept goes, and the gradient stays in its place


def test_what_is_not_saved_goes_with_its_name():
    def unsaved(tape, x):
        with tape.scope() as kept:
            middle = tape.op(x.size, (x,), lambda gradient: (tape.new(x.size),))
            kept.append(result := tape.op(x.size, (middle,), lambda gradient: (tape.new(x.size),)))
        return result

    played = play(unsaved, 8)
    assert peak(played.forward) == (16, 0)


def test_recomputation_keeps_the_input_alone():
    played = play(twice, 8, remat="full")
    assert peak(played.forward) == (16, 8)
    assert sum(n for _, n in (*played.forward, *played.backward)) == 0


def test_gradients_of_one_value_are_added():
    def both(tape, x):
        return tape.op(x.size, (x, x), lambda gradient: (tape.new(x.size), tape.new(x.size)))

    backward = play(both, 8).backward
    assert peak(backward) == (16, 0)
    assert backward.count(("bytes", 8)) == 3


def test_parameters_gradients_are_handed_over_after_what_was_saved_is_gone():
    def trains(tape, x):
        def backward(gradient):
            tape.gradient(5)
            return (tape.new(x.size),)

        return tape.op(4, (x,), backward, saves=(x,), trains=True)

    backward = play(trains, 8).backward
    assert backward == (("gradient", 5), ("bytes", 8), ("bytes", -8), ("bytes", -4), ("handed", 5))


def test_without_gradients_nothing_is_kept():
    played = play(twice, 8, needs_gradient=False)
    assert peak(played.forward)[1] == 0
    assert played.backward == ()


def test_what_is_lent_is_not_given_back():
    assert peak(play(twice, 8, lent=True).forward)[1] - peak(play(twice, 8).forward)[1] == 0
    own, lent = (play(twice, 8, lent=lent).backward for lent in (False, True))
    assert sum(n for _, n in lent) - sum(n for _, n in own) == 8
    lent = play(twice, 8, gradient_lent=True).backward
    assert sum(n for _, n in lent) - sum(n for _, n in own) == 8
