#include "moe/route_kernel.h"

namespace fastgpt::moe {

const RouteLoops kRouteLoopsAvx512 = kLoops;

}  // namespace fastgpt::moe
