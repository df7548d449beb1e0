// The CPU kernels. Compiled once per instruction set with MSDA_TARGET naming it; no standard
// library templates here, as their instances would be shared between the builds.
#include "kernels.hpp"

#include "backward.hpp"
#include "forward_in_place.hpp"
#include "forward_packed.hpp"

namespace detr_msda {
namespace MSDA_TARGET {
namespace {

// Runs body(Value{}) for the value type of a call.
template <class Body>
auto with_type(ValueType type, Body body) {
    switch (type) {
        case ValueType::float64:
            return body(double{});
        case ValueType::float16:
            return body(Half{});
        case ValueType::bfloat16:
            return body(BFloat16{});
        default:
            return body(float{});
    }
}

Index forward_scratch(const Problem &p, ValueType type, bool packed) {
    return with_type(type, [&](auto value) {
        using Acc = typename Accumulator<decltype(value)>::type;
        return packed ? packed_scratch<decltype(value)>(p) : Index(sizeof(Samples<Acc>));
    });
}

Index backward_scratch(const Problem &p, ValueType type, Index heads) {
    return with_type(type, [&](auto value) {
        using Acc = typename Accumulator<decltype(value)>::type;
        const Index sums =
            kSumsInPlace<decltype(value)> ? 0 : largest_level(p) * heads * p.channels;
        return Index(sizeof(Samples<Acc>)) + Index(sizeof(Corners<Acc>)) * kCapacity +
               sums * Index(sizeof(Acc));
    });
}

void run_forward(const Problem &p, ValueType type, const ForwardArrays &arrays, void *scratch,
                 const ForwardUnit &unit) {
    with_type(type, [&](auto value) {
        if (unit.packed) {
            forward_packed<decltype(value)>(p, arrays, scratch, unit);
        } else {
            forward_in_place<decltype(value)>(p, arrays, scratch, unit);
        }
        return 0;
    });
}

void run_backward(const Problem &p, ValueType type, const BackwardArrays &arrays, void *scratch,
                  const BackwardUnit &unit) {
    with_type(type, [&](auto value) {
        backward<decltype(value)>(p, arrays, scratch, unit);
        return 0;
    });
}

}  // namespace
}  // namespace MSDA_TARGET

#define MSDA_TEXT_OF(name) #name
#define MSDA_TEXT(name) MSDA_TEXT_OF(name)
#define MSDA_JOIN_OF(a, b) a##b
#define MSDA_JOIN(a, b) MSDA_JOIN_OF(a, b)

const Kernels &MSDA_JOIN(kernels_, MSDA_TARGET)() {
    using namespace MSDA_TARGET;
    static const Kernels kernels{MSDA_TEXT(MSDA_TARGET), forward_scratch, backward_scratch,
                                 run_forward, run_backward};
    return kernels;
}

}  // namespace detr_msda
