#include "kernels/sampler_rows.h"
#include "platform/per_isa.h"

namespace tokenmill {

TM_DEFINE_DISPATCH(SamplerRows, sampler_rows)

}  // namespace tokenmill
